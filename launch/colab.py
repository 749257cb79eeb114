"""Writes the address of a repository on GitHub into the README and the notebooks.

    python launch/colab.py https://github.com/OWNER/REPOSITORY [BRANCH]

The README and each notebook get a badge that opens the notebook in Colab. The notebooks clone this repository there.
Run the script again for another address. Colab opens notebooks from GitHub only.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BADGE = re.compile(r"\[!\[Open \w+ in Colab\].*\n")
MARK = "<!-- launch/colab.py writes the badges of Colab below this line -->\n"  # in the README


def main(address="", branch="main"):
    match = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", address)
    if not match or not re.fullmatch(r"[\w./-]+", branch):
        sys.exit("usage: launch/colab.py https://github.com/OWNER/REPOSITORY [BRANCH]")
    badges = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        link = f"https://colab.research.google.com/github/{match[1]}/blob/{branch}/notebooks/{path.name}"
        badge = f"[![Open {path.stem} in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})\n"
        badges.append(badge)
        notebook = json.loads(path.read_text())
        title, setup = notebook["cells"][:2]
        words = BADGE.sub("", "".join(title["source"])).lstrip("\n")
        title["source"] = f"{badge}\n{words}".splitlines(keepends=True)
        setup["source"] = [
            f'REPOSITORY = "https://github.com/{match[1]}"\n' if line.startswith("REPOSITORY =") else line
            for line in setup["source"]
        ]
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    readme = ROOT / "README.md"
    text = BADGE.sub("", readme.read_text())
    readme.write_text(text.replace(MARK, MARK + "".join(badges)))


if __name__ == "__main__":
    main(*sys.argv[1:3])
