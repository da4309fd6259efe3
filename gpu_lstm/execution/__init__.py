"""A layer as part of a call: its gradients, its operators for graphs, its streams and chunks of time."""
