"""K1, a studio for Kandinsky 5: ``python k1.py`` opens it, ``python k1.py --help`` says the rest."""

import sys

if sys.version_info < (3, 10):  # noqa: UP036  an older Python reads this line too
    sys.exit("K1 needs Python 3.10 to 3.12; this is " + sys.version.split()[0])

from kandinsky5.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
