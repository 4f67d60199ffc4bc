"""placeholder until report lands."""


def write(workdir):
  pass
