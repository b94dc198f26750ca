/*
 * Stands in where libdrm's headers are not installed: linux/kfd_ioctl.h includes
 * drm/drm.h for the integer types alone.
 */
#include <linux/types.h>
