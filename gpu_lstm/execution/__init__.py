"""The time loop of a layer as part of a call: its gradients, operators for graphs, streams and chunks of time."""
