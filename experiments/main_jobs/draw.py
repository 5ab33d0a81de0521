"""Generate the tables in README.md from the results.json of the two main runs.

python run.py                            -> its results.json is stored as demo.json
python run.py data=nli data.dir=DATA     -> nli.json
python experiments/main_jobs/draw.py
"""

import json
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
README = HERE.parents[1] / "README.md"


def table(results: dict) -> str:
    scores = results["scores"]
    tasks = list(scores["adapter"])
    lines = [f"| Spearman x 100 | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(f'{row[task]:.2f}' for task in tasks)} |" for name, row in scores.items()]
    machine, versions = results["machine"], results["versions"]
    lines += [
        "",
        f"{results['rows']:,} triplets, {results['steps']} steps, {results['trained_parameters']:,} trained parameters "
        f"({100 * results['trained_share']:.2f} %), best step by {results['dev']}; {results['seconds']:.0f} s in total on a "
        f"{machine['device']} with {machine['threads']} threads, trained in {machine['precision']}; seed {results['seed']}, "
        f"promcse_pl {versions['promcse_pl']}, torch {versions['torch']}.",
    ]
    return "\n".join(lines)


def main() -> None:
    text = README.read_text()
    for name in ("demo", "nli"):
        drawn = table(json.loads((HERE / f"{name}.json").read_text()))
        text, found = re.subn(
            rf"(<!-- {name} -->\n).*?(\n<!-- end -->)",
            lambda match, drawn=drawn: match[1] + drawn + match[2],
            text,
            flags=re.DOTALL,
        )
        assert found == 1, name
    README.write_text(text)


if __name__ == "__main__":
    main()
