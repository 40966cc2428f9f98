"""`python -m flashtune` and the command `flashtune`."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C ends with exit code 130 even while modules still load."""
    try:
        from flashtune.tuner.cli.main import cli

        cli(prog_name="flashtune")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
