"""`make bench` and its relatives: what the code reaches, beside what the machine can do, measured in one run."""
