// Package tunnel carries flows between the router and its concentrator over
// authenticated MPTCP sessions, and messages, each of which holds a packet, over
// such sessions and over QUIC.
//
// The path of a LAN client's bytes, from the router to the Internet:
//
//  1. intercept accepts the client's connection and takes a warm session from
//     the pool (pool.go), dialled and joined by all its subflows beforehand
//     (dial.go).
//  2. relay.go borrows a buffer once the client has sent something, puts the
//     OPEN frame and the first payload into one TLS record and writes it.
//  3. wire.go gathers the TLS records of one buffer into one write to the MPTCP
//     socket, and reads the socket only once it has data.
//  4. The concentrator's session (accept.go, session.go) decrypts, decodes the
//     frames (frame.go), dials the destination and relays.
//  5. The answer comes back the same way. When both directions have ended the
//     session, with its congestion windows, is back in the pool.
//
// Flows from the Internet to a host of the LAN go the other way, over sessions
// that the router has parked at the concentrator (inbound.go). Messages take
// stream.go or datagram.go instead of steps 1 and 2.
//
// # Protocol
//
// One MPTCP connection (RFC 8684) carries TLS 1.3 (RFC 8446) with the ALPN
// protocol "sheaf" (RFC 7301). Both ends present a self-signed certificate that
// only wraps an Ed25519 key (RFC 8410); the key is what is checked: the router
// knows the concentrator's from the enrolment token, the concentrator knows the
// router's from the enrolment.
//
// Inside TLS are frames: one byte of kind, three bytes of payload length, big
// endian, then the payload. The first frame comes from the router, HELLO or
// ENROL, and names the protocol versions it speaks and the role it wants the
// session in; WELCOME or REFUSE answers.
//
// Without a role, the router may OPEN one flow at a time after WELCOME. Each
// direction of a flow is any number of DATA frames and then END, or RESET at any
// point. When both directions have ended, the next OPEN may follow. PING is
// answered by PONG, at any time.
//
// With the role "inbound" it is the concentrator that opens flows; OPEN then has
// the number of a forward and the client's address.
//
// With the role "packets" HELLO also names the bond, a number that all carriers
// of one start of the router have in common, and WELCOME the addresses inside the
// tunnel. There are no flows: each PACKET is one message. The router may send its
// wishes as CONFIG; STATE answers with what became of them.
//
// One QUIC connection (RFC 9000) per uplink, to the UDP port of the same number,
// has the ALPN protocol "sheaf-packets" and the same keys. The router opens one
// bidirectional stream, on which HELLO, with the role "packets" and the uplink's
// name as link, and its answer travel as above. After WELCOME each DATAGRAM frame
// (RFC 9221) is one message.
//
// What comes to that UDP port and is not QUIC is WireGuard's, for the legs that were
// wished and granted in CONFIG and STATE (Wishes, Answers): it goes to package leg.
package tunnel
