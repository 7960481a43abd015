"""The command line: a file a command. Each parses, calls and shows; what takes long to import is imported inside."""
