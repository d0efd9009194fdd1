"""The command of a clone: `python main.py --config=configs/tiny.py --workdir=runs/tiny`."""

from umv2 import cli

if __name__ == "__main__":
    cli.run()
