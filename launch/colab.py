"""Open-in-Colab badges for the README and the notebooks, and what the notebooks clone, once it is known where that is.

    python launch/colab.py https://github.com/OWNER/REPOSITORY [BRANCH]

Run it again for another address. Colab opens notebooks from GitHub only.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BADGE = re.compile(r"\[!\[Open \w+ in Colab\].*\n")
MARK = "<!-- Colab -->\n"  # in the README, before the badges


def main(address="", branch="main"):
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", address)
    if not found or not re.fullmatch(r"[\w./-]+", branch):
        sys.exit("usage: launch/colab.py https://github.com/OWNER/REPOSITORY [BRANCH]")
    badges = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        link = f"https://colab.research.google.com/github/{found[1]}/blob/{branch}/notebooks/{path.name}"
        badge = f"[![Open {path.stem} in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})\n"
        badges.append(badge)
        book = json.loads(path.read_text())
        title, setup = book["cells"][:2]
        words = BADGE.sub("", "".join(title["source"])).lstrip("\n")
        title["source"] = f"{badge}\n{words}".splitlines(keepends=True)
        setup["source"] = [
            f'REPOSITORY = "https://github.com/{found[1]}"\n' if line.startswith("REPOSITORY =") else line
            for line in setup["source"]
        ]
        path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n")
    readme = ROOT / "README.md"
    text = BADGE.sub("", readme.read_text())
    readme.write_text(text.replace(MARK, MARK + "".join(badges)))


if __name__ == "__main__":
    main(*sys.argv[1:3])
