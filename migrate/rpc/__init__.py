"""gRPC adapters, TLS, and the generated protocol code."""
