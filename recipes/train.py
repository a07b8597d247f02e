"""Training for `accelerate launch`; `hf-al train` does the same with the same flags.

accelerate launch recipes/train.py --config recipes/tweets_lstm.yaml --output_dir out/tweets --learning_rate 1e-3
"""

import sys

from hf_al.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
