"""ABC attributes and a sentence for every image of the corpus: `factory caption` as a job.

ray job submit --address http://127.0.0.1:8265 -- python $PWD/jobs/caption.py --run $PWD/runs/first
"""

from factory.cli import main

if __name__ == "__main__":
    main("caption")
