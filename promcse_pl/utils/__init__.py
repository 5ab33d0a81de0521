"""Files, processes, streams, errors and other helpers without knowledge of the project. May import nothing above."""
