"""Draw the figures and the report of a run again, from the files in its output directory.

python -m training.visualization outputs/demo --method tsne
"""

import argparse
import sys

from training.errors import UserError
from training.visualization.draw import draw_run


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.visualization",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output_dir", help="output directory of a run, finished or not")
    parser.add_argument("--method", choices=("pca", "tsne"), default="pca", help="of the embedding space (pca)")
    options = parser.parse_args()

    try:
        failed = draw_run(options.output_dir, options.method)
    except UserError as error:
        sys.exit(f"error: {error}")
    for name, reason in failed.items():
        print(f"error: {name} could not be drawn: {reason}", file=sys.stderr)
    print(f"figures and report.html: {options.output_dir}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
