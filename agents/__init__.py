"""The daemon of one host: source and destination halves, and its gRPC servicers."""
