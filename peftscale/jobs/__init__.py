"""Jobs: a run file as something that a cluster takes. `render` writes it; running it is `driver`, on the cluster."""
