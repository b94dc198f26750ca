/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Included before everything else. Shared virtual memory moves pages between CPU and
 * GPU, which needs far more of amdgpu than this module has: amdkfd has a switch for it.
 */
#undef CONFIG_HSA_AMD_SVM
