"""Generator of promcse_pl/data/demo_data: sentences of a small grammar with exact labels. Imports nothing of promcse_pl."""
