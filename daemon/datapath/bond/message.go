package bond

import (
	"encoding/binary"
	"fmt"
	"time"
)

const (
	kindPacket = 0x10
	kindProbe  = 0x20
	kindReply  = 0x21

	flagExplicit = 0x01
	flagFirst    = 0x02
	flagSecond   = 0x04

	packetHeader = 6
	probeLength  = 13
	replyLength  = 17

	// lanes of each class; those of bulk follow those of interactive flows.
	lanes = 128

	// MaxPacket is the longest IP packet that is carried, bytes.
	MaxPacket = 1500
	// MaxMessage is the longest message that is made, bytes.
	MaxMessage = MaxPacket + 32
)

// message is what was read of one; packet shares the bytes read from.
type message struct {
	kind byte

	// of a packet
	explicit, first, second bool
	lane                    uint8
	sequence                uint32
	packet                  []byte

	// of a probe and its reply
	number   uint32
	time     time.Duration // the other end's clock
	received uint32
}

// decode reads a message. Its error says what is malformed.
func decode(m []byte) (message, error) {
	if len(m) == 0 || len(m) > MaxMessage {
		return message{}, fmt.Errorf("malformed message: %d bytes, want 1 to %d", len(m), MaxMessage)
	}
	switch kind := m[0]; {
	case kind&^(flagExplicit|flagFirst|flagSecond) == kindPacket:
		if len(m) <= packetHeader || len(m) > packetHeader+MaxPacket {
			return message{}, fmt.Errorf("malformed PACKET: %d bytes, want %d to %d", len(m), packetHeader+1, packetHeader+MaxPacket)
		}
		d := message{
			kind:     kindPacket,
			explicit: kind&flagExplicit != 0,
			first:    kind&flagFirst != 0,
			second:   kind&flagSecond != 0,
			lane:     m[1],
			sequence: binary.BigEndian.Uint32(m[2:]),
			packet:   m[packetHeader:],
		}
		if d.first && d.second {
			return message{}, fmt.Errorf("malformed PACKET: flags %#x say first and second half at once", kind)
		}
		return d, nil
	case kind == kindProbe:
		if len(m) < probeLength {
			return message{}, fmt.Errorf("malformed PROBE: %d bytes, want at least %d", len(m), probeLength)
		}
		return message{kind: kind, number: binary.BigEndian.Uint32(m[1:]), time: readTime(m[5:])}, nil
	case kind == kindReply:
		if len(m) != replyLength {
			return message{}, fmt.Errorf("malformed PROBE_REPLY: %d bytes, want %d", len(m), replyLength)
		}
		return message{kind: kind, number: binary.BigEndian.Uint32(m[1:]), time: readTime(m[5:]), received: binary.BigEndian.Uint32(m[13:])}, nil
	default:
		return message{}, fmt.Errorf("malformed message: kind %#x does not exist", kind)
	}
}

// readTime keeps to a range in which differences of two times cannot overflow.
func readTime(b []byte) time.Duration {
	return time.Duration(binary.BigEndian.Uint64(b)&(1<<51-1)) * time.Microsecond
}

func appendTime(b []byte, t time.Duration) []byte {
	return binary.BigEndian.AppendUint64(b, uint64(t/time.Microsecond))
}

func appendProbe(b []byte, number uint32, now time.Duration) []byte {
	return appendTime(binary.BigEndian.AppendUint32(append(b, kindProbe), number), now)
}

func appendReply(b []byte, number uint32, arrived time.Duration, received uint32) []byte {
	b = appendTime(binary.BigEndian.AppendUint32(append(b, kindReply), number), arrived)
	return binary.BigEndian.AppendUint32(b, received)
}

func putPacketHeader(b []byte, flags byte, lane uint8, sequence uint32) {
	b[0], b[1] = kindPacket|flags, lane
	binary.BigEndian.PutUint32(b[2:], sequence)
}

// laneOf gives the lane of a flow.
func laneOf(hash uint64, class Class) uint8 {
	// Other bits than those that choose the set of the flow table.
	return uint8(hash>>32%lanes) + uint8(class)*lanes
}

func classOf(lane uint8) Class { return Class(lane / lanes) }
