"""Sources to one clean, split corpus: `factory ingest` as a job.

ray job submit --address http://127.0.0.1:8265 -- python $PWD/jobs/ingest.py --run $PWD/runs/first --recipe smoke
"""

from factory.cli import main

if __name__ == "__main__":
    main("ingest")
