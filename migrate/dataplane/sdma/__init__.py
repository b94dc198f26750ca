"""The ``sdma`` side of the ``MemoryAccess`` seam: the GPU's own DMA engine copies VRAM."""
