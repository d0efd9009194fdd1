"""The `umv2` command in a clone: `python main.py --config=tiny --workdir=runs/tiny`."""

from umv2 import cli

if __name__ == "__main__":
    cli.run()
