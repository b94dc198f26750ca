"""Programs that migrate: they speak the KFD ABI alone and check themselves."""
