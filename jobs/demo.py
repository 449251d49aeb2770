"""The whole line on the embedded default: `factory demo` as a job.

ray job submit --address http://127.0.0.1:8265 -- python $PWD/jobs/demo.py --out $PWD/runs/demo
"""

from factory.cli import main

if __name__ == "__main__":
    main("demo")
