// Package bond carries IP packets over several links at once. The same code
// runs at both ends.
//
// The path of a packet:
//
//  1. Bond.Send (bond.go) takes it from the TUN, reads its header (header.go)
//     and gives it a class by what is known of its flow (class.go).
//  2. It gets the next sequence number of its flow's lane, and the link or the
//     two links with the earliest expected delivery (choose.go).
//  3. On each of them it waits in a queue that drops what would come late
//     (queue.go), until the carrier has room. What the carrier cannot take in one
//     message goes as two.
//  4. At the far end Bond.Receive drops the second copy, puts the packets of a
//     bulk lane in order again, and never holds one for long (lane.go).
//  5. Deliver gets them in batches, from one goroutine.
//
// Whether a link is fit, how far away its other end is and how much it loses is
// found by probes (link.go), which Bond.Run sends: often on links in use, rarely
// on idle ones.
//
// # Protocol
//
// Carriers deliver messages of at most MaxMessage bytes, unreliably and mostly in
// order, with their boundaries. They authenticate and encrypt; this package does
// neither. Integers are big endian.
//
//	PACKET       kind and flags (1) · lane (1) · sequence (4) · packet
//	PROBE        kind (1) · number (4) · sender's time (8) · padding
//	PROBE_REPLY  kind (1) · number (4) · time of arrival (8) · received (4)
//
// PACKET is 0x10 and these flags: 0x01 the class was the operator's or the
// application's explicit choice, which the other end follows for the way back;
// 0x02 the first half of a packet; 0x04 the second half. The halves of a packet
// have the same lane and sequence and travel on the same link.
//
// The lane is taken from a hash of the flow that is the same for both directions:
// 0 to 127 for interactive flows, 128 to 255 for bulk ones, so it also tells the
// class. Each lane of each direction counts its packets from 0, modulo 2^32, over
// all links together; copies of a packet have the same sequence.
//
// PROBE is 0x20 and PROBE_REPLY 0x21. Every PROBE is answered on the link it came
// by, at once. Times are microseconds of the sending end's monotonic clock since
// some moment of its own: only differences between links mean anything, and they
// say which link is faster in one direction whatever the other direction does.
// Received is the number of messages, of any kind and modulo 2^32, that came over
// this link before the PROBE.
//
// Some PROBEs are padded to the longest message that the carrier takes: where only
// these are not answered, the path has come to take less than the carrier knows,
// and the carrier is closed.
//
// Messages of other kinds, and malformed ones, are dropped and counted.
package bond
