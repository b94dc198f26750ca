"""The simulated KFD node: amdkfd of Linux 6.1 and its GPUs as one process, without root.

``python -m migrate.kfd.sim --root DIR --profile NAME`` is a host whose paths are
``HostPaths.under(DIR)``. It speaks raw request numbers and raw structs (client, transport,
server, dispatch), behaves as the driver's source says (ioctls and the ``*_ioctls`` modules,
criu and the ``criu_*`` modules, scheduler, events, process, device), and executes what
is put into queues (engine, kernels; opcodes and aql are what a workload needs to know).

It keeps no state on disk; what is in DIR is there to be looked at or to command it:

* ``sys/topology``, ``sys/proc/PID``, ``drm/renderD*/device``: as sysfs shows them;
* ``run/kernel.log``: faults, and ``oops: ...`` where the real kernel would have crashed
  (the device answers EIO ever after);
* ``run/faults/NAME``: drills, see faults;
* ``run/devices/PID``: render minors that PID and its descendants may see, read when they
  open the device: what a device cgroup is to the real one. Without it they see all.

SVM is EPERM, as a kernel built without it, unless the node is started with --svm; then
ranges are registered, told by CHECKPOINT and made anew by RESUME. What it does not have:
GPU access to SVM ranges, PM4 and SDMA packets
(such queues can be made and moved, and never run), page migration.
"""
