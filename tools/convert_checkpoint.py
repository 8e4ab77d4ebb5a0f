"""`megatron-apt convert` from a source tree.

python tools/convert_checkpoint.py import | export | verify ...
"""

import sys

from megatron_apt.cli import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
