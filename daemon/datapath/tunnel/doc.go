// Package tunnel carries flows between the router and its concentrator over
// authenticated MPTCP sessions.
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
// ENROL, and names the protocol versions it speaks; WELCOME or REFUSE answers.
// After WELCOME the router may OPEN one flow at a time. Each direction of a flow
// is any number of DATA frames and then END, or RESET at any point. When both
// directions have ended, the next OPEN may follow. PING is answered by PONG, at
// any time.
package tunnel
