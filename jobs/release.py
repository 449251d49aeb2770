"""Sealed Parquet, a dataset card and the report: `factory release` as a job.

ray job submit --address http://127.0.0.1:8265 -- python $PWD/jobs/release.py --run $PWD/runs/first
"""

from factory.cli import main

if __name__ == "__main__":
    main("release")
