"""Decides every sample, its id and its seed: `factory plan` as a job. It needs no worker.

ray job submit --address http://127.0.0.1:8265 -- python $PWD/jobs/plan.py --run $PWD/runs/first --count 40000
"""

from factory.cli import main

if __name__ == "__main__":
    main("plan")
