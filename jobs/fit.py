"""Fits lora, gate, mae, finetune or distill on Ray Train: `factory fit` as a job. A stopped one goes on where it was.

ray job submit --address http://127.0.0.1:8265 -- python $PWD/jobs/fit.py lora --run $PWD/runs/first
"""

from factory.cli import main

if __name__ == "__main__":
    main("fit")
