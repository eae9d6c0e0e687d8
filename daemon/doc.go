// Package daemon is a map; its packages do the work.
//
//	data     LAN client ─▶ intercept ─▶ tunnel ═╦═ uplink 1 ═╦═▶ tunnel ─▶ egress ─▶ Internet
//	                       (TPROXY)             ╠═ uplink 2 ═╣  (concentrator)
//	                                            ╚═ uplink N ═╝
//	control  a click, a file, an event ─▶ settings ─▶ desired ─▶ reconcile ─▶ kernel
//
//	router/            joins both paths on the device
//	concentrator/      joins both paths in the cloud
//	datapath/
//	  intercept/       diverted LAN traffic → flows
//	  tunnel/          flows ↔ authenticated MPTCP sessions, both ends
//	  uplink/          watching each WAN: fit or unfit
//	  egress/          flow → Internet, with what it refuses
//	control/
//	  settings/        the operator's choices: schema, validation, revisions
//	  desired/         settings + uplinks → State; Diff(have, want) → Changes. Pure
//	  reconcile/       wake, read the kernel, diff, apply, back off
//	  kernel/          every effect on the kernel
//	netlab/            a small Internet in network namespaces
//	netlab/deploy/     the real daemons in it
//
// A package may import, of ours, only what layout_test.go lists for it.
package daemon
