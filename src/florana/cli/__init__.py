"""The command line: verbs that parse and call one function each, progress and tables."""
