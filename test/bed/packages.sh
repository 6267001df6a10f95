# Sourced by build: what the bed is made of.

# Userland of the guest's initramfs. Everything is unpacked below the cache, nothing is installed.
# shellcheck disable=SC2034
userland_packages=(
  rdma-core libibverbs1 ibverbs-providers ibverbs-utils librdmacm1 rdmacm-utils perftest libibumad3
  libnl-3-200 libnl-route-3-200 libpci3
  iproute2 kmod libkmod2 busybox-static dash
)

# Debian's meta package; the kernel itself is what it depends on.
kernel_package=linux-image-amd64

# Loaded by /init at every start; what they depend on is added.
boot_modules=(
  crc32_generic crc32_pclmul virtio_pci 9pnet_virtio 9p overlay
  bridge veth sch_netem rdma_rxe ib_uverbs rdma_ucm
)
# Carried along for `modprobe` in the guest.
extra_modules=(tun dummy loop ext4 virtio_blk tcp_diag inet_diag sch_tbf act_police)

# Programs of the unpacked packages that go into the initramfs: patterns of file names.
programs='ib_*|ibv_*|rdma|rping|ucmatose|ip|bridge|ss|tc|kmod|modprobe|lsmod'
