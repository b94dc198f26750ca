"""CRIU itself: its RPC, its log. Knows nothing of KFD or of migrations."""
