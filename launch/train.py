"""Train a run file: python launch/train.py configs/quickstart.yaml [key=value ...]"""

import sys

from peftscale.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
