"""The console script `ddo-jax`, which is `python -m ddo_jax.main`."""

import runpy


def main() -> None:
  """Runs the command line as the program's main module."""
  runpy.run_module('ddo_jax.main', run_name='__main__', alter_sys=True)


if __name__ == '__main__':
  main()
