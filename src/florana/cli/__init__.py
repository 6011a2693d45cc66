"""The command line: verbs that parse and call one function each, and what a person sees."""
