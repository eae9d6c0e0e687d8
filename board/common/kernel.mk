# The kernel of the firmware: its version, its source and our patches to it, and
# the virtual machine in which they are proven. Debian serves the source, in the
# same bytes as the release but for a few files without a free licence.

KERNEL_VERSION := 6.18.15
KERNEL_PACKAGE := linux=$(KERNEL_VERSION)-1~bpo13+1
KERNEL_SUITE := trixie-backports
KERNEL_SHA256 := fdf4c4d487c95b17a41cb38003faef86669e532a44fe702eb31a3390b6a60cca

# Where the suite is: the mirror from which this machine gets its own packages.
KERNEL_MIRROR ?= $(shell apt-get indextargets --format '$$(REPO_URI)' 'Origin: Debian' 'Label: Debian' 2>/dev/null | head -n 1)
# A file with the source, for machines that reach no such mirror.
KERNEL_TARBALL ?= $(KERNEL_BUILD)/linux_$(KERNEL_VERSION).orig.tar.xz

KERNEL_COMMON := board/common
KERNEL_PATCHES := $(sort $(wildcard $(KERNEL_COMMON)/patches/linux/*.patch))
KERNEL_TEST := $(sort $(wildcard $(KERNEL_COMMON)/kerneltest/*))
KERNEL_BUILD := build/kernel
KERNEL_TREE := $(KERNEL_BUILD)/linux-$(KERNEL_VERSION)
KERNEL_OUT := $(KERNEL_BUILD)/out-$(KERNEL_VERSION)
KERNEL_APT = -o Dir::Etc::SourceList=$(CURDIR)/$(KERNEL_BUILD)/apt/sources.list -o Dir::Etc::SourceParts=/dev/null \
	-o Dir::State::Lists=$(CURDIR)/$(KERNEL_BUILD)/apt/lists -o Dir::Cache=$(CURDIR)/$(KERNEL_BUILD)/apt -o APT::Sandbox::User=root
# Building and testing take the time that others leave.
KERNEL_NICE := nice -n 19 chrt --idle 0
# In the host's seconds; it takes some six minutes of processor time.
KERNEL_TEST_LIMIT := 2400

# kernel-digest changes when what kernel-test proves does.
.PHONY: kernel-digest
kernel-digest:
	@cat $(KERNEL_COMMON)/kernel.mk $(KERNEL_PATCHES) $(KERNEL_TEST) | sha256sum | cut -d ' ' -f 1

# The guest counts time in instructions (icount), so that what it measures does
# not depend on how busy this machine is, and skips the time in which it idles.
.PHONY: kernel-test
kernel-test: need-kernel $(KERNEL_OUT)/arch/x86/boot/bzImage ## build the firmware's kernel with our patches and prove the packet schedulers in a virtual machine
	CGO_ENABLED=0 GOARCH=amd64 go build -trimpath -tags $(TAGS) -ldflags "-s -w" -o $(KERNEL_BUILD)/init ./$(KERNEL_COMMON)/kerneltest
	printf 'dir /dev 755 0 0\nnod /dev/console 600 0 0 c 5 1\ndir /proc 755 0 0\ndir /sys 755 0 0\nfile /init %s 755 0 0\n' $(KERNEL_BUILD)/init > $(KERNEL_BUILD)/initramfs.list
	$(KERNEL_OUT)/usr/gen_init_cpio $(KERNEL_BUILD)/initramfs.list > $(KERNEL_BUILD)/initramfs
	$(KERNEL_NICE) timeout $(KERNEL_TEST_LIMIT) qemu-system-x86_64 -M pc -accel tcg -icount shift=1,sleep=off -rtc clock=vm -smp 2 -m 512 \
		-nodefaults -nographic -no-reboot -serial stdio -kernel $(KERNEL_OUT)/arch/x86/boot/bzImage -initrd $(KERNEL_BUILD)/initramfs \
		-append 'console=ttyS0 quiet loglevel=5 panic=-1 tsc=reliable' </dev/null | sed -u 's,\r,,g' | tee $(KERNEL_BUILD)/console
	@! grep -aE '^FAIL|WARNING:|BUG:|Oops|Kernel panic|Call Trace|INFO: ' $(KERNEL_BUILD)/console
	@grep -aqE '^kernel-test: [1-9][0-9]* passed, 0 failed$$' $(KERNEL_BUILD)/console || { echo "the virtual machine did not reach the end of the tests within $(KERNEL_TEST_LIMIT) s; its console is in $(KERNEL_BUILD)/console"; exit 1; }
	{ $(MAKE) -s kernel-digest; echo "Linux $(KERNEL_VERSION)"; grep -aE '^(ok |kernel-test: )' $(KERNEL_BUILD)/console; } > $(KERNEL_COMMON)/verified

$(KERNEL_OUT)/arch/x86/boot/bzImage: $(KERNEL_TREE)/.patched $(KERNEL_COMMON)/kerneltest/kernel.config
	$(KERNEL_NICE) $(MAKE) -s -C $(KERNEL_TREE) O=$(CURDIR)/$(KERNEL_OUT) ARCH=x86_64 KCONFIG_ALLCONFIG=$(CURDIR)/$(KERNEL_COMMON)/kerneltest/kernel.config allnoconfig
	@for option in $$(sed -n 's/=y$$//p' $(KERNEL_COMMON)/kerneltest/kernel.config); do grep -q "^$$option=y" $(KERNEL_OUT)/.config || { echo "$(KERNEL_COMMON)/kerneltest/kernel.config: Linux $(KERNEL_VERSION) does not take $$option=y"; exit 1; }; done
	$(KERNEL_NICE) $(MAKE) -s -C $(KERNEL_TREE) O=$(CURDIR)/$(KERNEL_OUT) ARCH=x86_64 -j$$(nproc) bzImage

# Both trees are made anew when a patch changes: files of a tarball are old, so
# that objects of what is patched no more would stay.
$(KERNEL_TREE)/.patched: $(KERNEL_TARBALL) $(KERNEL_PATCHES)
	echo "$(KERNEL_SHA256)  $(KERNEL_TARBALL)" | sha256sum --check --quiet
	rm -rf $(KERNEL_TREE) $(KERNEL_OUT)
	mkdir -p $(KERNEL_OUT)
	tar -x -f $(KERNEL_TARBALL) -C $(KERNEL_BUILD)
	for patch in $(KERNEL_PATCHES); do patch -d $(KERNEL_TREE) -p1 -s --no-backup-if-mismatch -F0 < $$patch || exit; done
	touch $@

$(KERNEL_BUILD)/linux_$(KERNEL_VERSION).orig.tar.xz:
	@test -n "$(KERNEL_MIRROR)" || { echo "this machine's package sources name no Debian mirror: give one as KERNEL_MIRROR=<URL>, or the source of Linux $(KERNEL_VERSION) as KERNEL_TARBALL=<file>"; exit 1; }
	mkdir -p $(KERNEL_BUILD)/apt/lists/partial $(KERNEL_BUILD)/apt/archives/partial
	echo 'deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(KERNEL_MIRROR) $(KERNEL_SUITE) main' > $(KERNEL_BUILD)/apt/sources.list
	apt-get $(KERNEL_APT) -q update
	cd $(KERNEL_BUILD) && apt-get $(KERNEL_APT) -q source --download-only --tar-only '$(KERNEL_PACKAGE)'

.PHONY: need-kernel
need-kernel:
	$(call need,qemu-system-x86_64,qemu-system-x86)
	$(call need,flex,flex)
	$(call need,bison,bison)
	$(call need,bc,bc)
	$(call need,gcc,gcc libc6-dev)
	$(call need,patch,patch)
	$(call need,xz,xz-utils)
	@test -e /usr/include/libelf.h || { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends libelf-dev; }
	@test -e /usr/share/keyrings/debian-archive-keyring.gpg || { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends debian-archive-keyring; }
