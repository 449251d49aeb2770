"""Measures worth, gate, captions or near copies: `factory evaluate` as a job.

ray job submit --address http://127.0.0.1:8265 -- python $PWD/jobs/evaluate.py worth --run $PWD/runs/first
"""

from factory.cli import main

if __name__ == "__main__":
    main("evaluate")
