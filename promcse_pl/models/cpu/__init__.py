"""Fast frozen-encoder computation on CPUs: chunks, dropout, fused layers."""
