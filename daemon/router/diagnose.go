package router

// The path of a diagnosis:
//
//	each uplink: interface ─▶ carrier ─▶ address ─▶ gateway ─▶ concentrator
//	joined ─▶ tunnel ─▶ packets ─▶ dns          the LAN's interfaces
//	the first that fails of what all need ─▶ one sentence, and what to do
//
// What needs something that has failed is skipped: it would only say the same again.

import (
	"cmp"
	"context"
	"fmt"
	"strings"

	"sheaf/daemon/control/settings"
	"sheaf/daemon/datapath/uplink"
	"sheaf/webui"
)

// Diagnose looks at everything that traffic needs.
func (r *Router) Diagnose(ctx context.Context) (webui.Diagnosis, error) {
	s, err := r.Status(ctx)
	if err != nil {
		return webui.Diagnosis{}, err
	}
	r.mu.Lock()
	statuses := r.uplinks
	r.mu.Unlock()
	obstacles := map[string]uplink.Obstacle{}
	for _, u := range statuses {
		obstacles[u.Name] = u.Obstacle()
	}
	return diagnose(s, obstacles), nil
}

// stages are an uplink's checks up to each obstacle, and what to do there.
var stages = []struct {
	name, right, fix string
}{
	uplink.AtInterface: {"interface", "it exists", "Connect the modem or card of %s, or give the uplink another interface."},
	uplink.AtCarrier:   {"carrier", "something answers at the other end of the link", "Check the cable of %s, and whether its modem has power."},
	uplink.AtAddress:   {"address", "", "Check whether the modem of %s hands out addresses, and whether the provider is in order."},
	uplink.AtGateway:   {"gateway", "", "Give %s a default route, or the uplink a gateway of its own."},
}

const (
	checkOK      = "ok"
	checkFailed  = "failed"
	checkSkipped = "skipped"
	checkOff     = "off"
)

// diagnose is Diagnose of a status, and of how far each uplink has come.
func diagnose(s webui.Status, obstacles map[string]uplink.Obstacle) webui.Diagnosis {
	d := webui.Diagnosis{Healthy: true}
	check := func(uplink, name, state, detail string) {
		d.Checks = append(d.Checks, webui.Check{Uplink: uplink, Name: name, State: state, Detail: detail})
		d.Healthy = d.Healthy && state != checkFailed
	}
	type fault struct{ verdict, fix string }
	var ofUplinks []fault
	on, reach := 0, 0
	joined := s.Concentrator.Address != ""
	for _, u := range s.Uplinks {
		if u.Mode == string(settings.Off) {
			check(u.Name, stages[uplink.AtInterface].name, checkOff, "switched off by the operator")
			continue
		}
		on++
		at := obstacles[u.Name]
		for i, is := range stages {
			right := is.right
			stage := uplink.Obstacle(i)
			switch stage {
			case uplink.AtAddress:
				right = u.Address
			case uplink.AtGateway:
				right = cmp.Or(u.Gateway, "the other end of the link")
			}
			switch {
			case stage < at:
				check(u.Name, is.name, checkOK, right)
			case stage == at:
				check(u.Name, is.name, checkFailed, u.Reason)
				ofUplinks = append(ofUplinks, fault{fmt.Sprintf("Uplink %s carries nothing: %s.", u.Name, u.Reason), fmt.Sprintf(is.fix, u.Interface)})
			default:
				check(u.Name, is.name, checkSkipped, "")
			}
		}
		switch {
		case at != uplink.Past || !joined:
			check(u.Name, "concentrator", checkSkipped, "")
		case u.State == "carrying":
			reach++
			check(u.Name, "concentrator", checkOK, "reached")
		case u.State == "standby":
			reach++
			check(u.Name, "concentrator", checkOK, u.Reason)
		default:
			check(u.Name, "concentrator", checkFailed, u.Reason)
			ofUplinks = append(ofUplinks, fault{fmt.Sprintf("Uplink %s does not reach the concentrator: %s.", u.Name, u.Reason),
				fmt.Sprintf("Restart the modem of %s; if that does not help, ask its provider.", u.Interface)})
		}
	}

	up := s.Tunnel.State == "up" || s.Tunnel.State == "degraded"
	switch {
	case !joined:
		check("", "joined", checkFailed, "the router belongs to no concentrator yet")
		check("", "tunnel", checkSkipped, "")
	case up:
		check("", "joined", checkOK, s.Concentrator.Address)
		check("", "tunnel", checkOK, strings.TrimSuffix(s.Tunnel.State+": "+s.Tunnel.Reason, ": "))
	default:
		check("", "joined", checkOK, s.Concentrator.Address)
		check("", "tunnel", checkFailed, s.Tunnel.Reason)
	}
	switch {
	case !up:
		check("", "packets", checkSkipped, "")
	case s.Packets.State == "up":
		check("", "packets", checkOK, "UDP, QUIC and ICMP pass")
	default:
		check("", "packets", checkFailed, "UDP, QUIC and ICMP do not pass the tunnel")
	}
	switch {
	case s.DNS.Server != "":
		check("", "dns", checkOK, s.DNS.Server+" through "+s.DNS.Through)
	case !up:
		check("", "dns", checkSkipped, "")
	default:
		check("", "dns", checkOff, "the router answers no queries")
	}
	var absent []string
	for _, i := range s.LAN.Interfaces {
		if i.Present {
			check("", "lan", checkOK, i.Name)
		} else {
			check("", "lan", checkFailed, i.Name+" does not exist")
			absent = append(absent, i.Name)
		}
	}

	verdict := func(f fault) webui.Diagnosis { d.Verdict, d.Fix = f.verdict, f.fix; return d }
	switch {
	case len(s.Uplinks) == 0:
		return verdict(fault{"No uplink is set up.", "Add the uplinks to the settings."})
	case on == 0:
		return verdict(fault{"Every uplink is switched off.", "Switch one on: `sheafctl uplink set NAME --mode on`."})
	case !joined && len(ofUplinks) < on:
		return verdict(fault{"The router has not joined a concentrator.", "Make a token there, and join: `sheafctl join TOKEN`."})
	case !up && len(ofUplinks) == 1:
		return verdict(ofUplinks[0])
	case !up && len(ofUplinks) == on && reach == 0 && failedAt(d.Checks, "concentrator") == on:
		return verdict(fault{fmt.Sprintf("No uplink reaches the concentrator %s: it is probably down itself.", s.Concentrator.Address),
			"Check whether concentratord runs there, and whether port and address are open for TCP and UDP."})
	case !up && len(ofUplinks) > 0:
		return verdict(fault{"No uplink works. " + ofUplinks[0].verdict, ofUplinks[0].fix})
	case !up:
		return verdict(fault{"The tunnel is down: " + s.Tunnel.Reason + ".", "Wait a moment; if it stays so, look into the log of concentratord."})
	case len(absent) > 0:
		return verdict(fault{"Clients behind " + strings.Join(absent, ", ") + " reach nothing: there is no such interface.", "Connect it, or name another in `lan.interfaces`."})
	case s.Packets.State != "up":
		return verdict(fault{"TCP passes the tunnel, UDP, QUIC and ICMP do not.", "Look into the log of sheafd for the reason."})
	case len(ofUplinks) > 0:
		f := ofUplinks[0]
		f.verdict = "The tunnel works, but not over all uplinks. " + f.verdict
		return verdict(f)
	case !d.Healthy:
		return verdict(fault{"The tunnel works, but not all is in order.", ""})
	}
	return verdict(fault{"Everything works.", ""})
}

func failedAt(checks []webui.Check, name string) (n int) {
	for _, c := range checks {
		if c.Name == name && c.State == checkFailed {
			n++
		}
	}
	return n
}
