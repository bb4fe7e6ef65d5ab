"""The verbs of the command line: one module each, thin over the public Python functions.

Imports of a verb happen when it runs, so that `--help` answers at once.
"""
