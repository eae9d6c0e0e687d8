// Package daemon is a map; its packages do the work.
//
//	data     LAN TCP     ─▶ intercept ─▶ tunnel ═══════╦═ uplink 1 ═╦═▶ tunnel ─▶ egress ─▶ Internet
//	         other packets ─▶ tun ─▶ bond ─▶ tunnel ═══╩═ uplink N ═╩═▶ tunnel ─▶ bond ─▶ tun ─▶ Internet
//	control  a click, a file, an event ─▶ settings ─▶ desired ─▶ reconcile ─▶ kernel
//
//	router/            joins both paths on the device
//	concentrator/      joins both paths in the cloud
//	datapath/
//	  intercept/       diverted LAN TCP → flows
//	  tun/             the TUN device of either end: packets ↔ the kernel
//	  bond/            packets ↔ messages over several links, classes, order, copies
//	  tunnel/          flows and messages ↔ authenticated MPTCP sessions and QUIC connections, both ends
//	  leg/             packets of subflows ↔ UDP, past what strips MPTCP, both ends
//	  uplink/          watching each WAN: fit or unfit
//	  egress/          flow → Internet, with what it refuses; ports and names for the routers
//	control/
//	  settings/        the operator's choices: schema, validation, revisions
//	  desired/         settings + uplinks → State; Diff(have, want) → Changes. Pure
//	  reconcile/       wake, read the kernel, diff, apply, back off
//	  kernel/          every effect on the kernel
//	netlab/            a small Internet in network namespaces
//	netlab/deploy/     the real daemons in it
//
// Beside them, board/common/kerneltest proves our patches to the firmware's kernel.
//
// A package may import, of ours, only what layout_test.go lists for it.
package daemon
