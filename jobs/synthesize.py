"""Carries out the plan, exactly once: `factory synthesize` as a job. Submit it again to go on.

ray job submit --address http://127.0.0.1:8265 -- python $PWD/jobs/synthesize.py --run $PWD/runs/first
"""

from factory.cli import main

if __name__ == "__main__":
    main("synthesize")
