"""Moving memory: frames, chunks, codecs, sender, receiver, staging, verification."""
