"""How synthesis scales on this machine: one plan on 1, 2 and 4 local nodes, then with a node killed. `make scaling`.

The network sleeps, everything else is what `factory synthesize` runs. The numbers go to RUN/lab/scaling.json, and the
report on RUN gets a section on them.

    python jobs/scaling.py --run runs/scaling
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from factory import line, recipe
from factory.run import Run
from factory.runtime.scaling import GOAL, Setting, measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/scaling", help="where the numbers and the report go")
    parser.add_argument("--count", type=int, default=Setting.count, help="samples of the plan")
    parser.add_argument("--unit-rows", type=int, default=Setting.unit_rows, help="samples that are committed together")
    parser.add_argument("--call-s", type=float, default=Setting.call_s, help="seconds that a call sleeps")
    parser.add_argument("--nodes", type=int, nargs="+", default=Setting.nodes, help="on how many nodes, in turn")
    parser.add_argument("--out", type=Path, help="the numbers once more, as a file")
    wanted = parser.parse_args()
    setting = Setting(wanted.count, wanted.unit_rows, wanted.call_s, nodes=tuple(wanted.nodes))
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        found = measure(Path(folder), setting) | {"cpus": os.cpu_count(), "goal": GOAL}
    run, text = Run(wanted.run), json.dumps(found, indent=2) + "\n"
    known = run.recipe() or recipe.load("smoke", [])
    if run.header() is None:
        run.write_header(known)
    run.store.replace("lab/scaling.json", text.encode())
    if wanted.out is not None:
        wanted.out.write_text(text)
    line.report(run, known)


if __name__ == "__main__":
    main()
