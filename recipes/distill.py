"""Distil a ternary model from an encoder of texts or images, on unlabelled data.

    python recipes/distill.py --config recipes/configs/minilm.yaml [--any_field value ...]

A flag overrides the yaml file. Run it again after a stop: it goes on from the last checkpoint in output_dir.
"""

import sys

from hf_ternary.distill import DistillArguments, distill
from options import parse


def main() -> None:
    try:
        options = parse(DistillArguments, sys.argv[1:], __doc__)
        distill(options)
        print(f"the model is in {options.output_dir}/model")
    except (ValueError, ImportError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
