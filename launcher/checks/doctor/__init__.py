"""`launcher doctor`: the machine and the cluster."""
