package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"sheaf/daemon/netlab"
	"sheaf/daemon/netlab/deploy"
)

// What is not TCP, each kind measured over the best uplink alone and then over
// the bond:
//
//	probe   LAN ─ 50/s × 200 bytes ─▶ echo on the server ─▶ LAN    idle (awake.go), beside a download, with uplink1 black-holed
//	bulk    LAN ─ 90 Mbit/s of payload, one way ─▶ server, and back
//	QUIC    server ─ one download ─▶ LAN
const (
	echoPort, bulkPort, quicPort = 5003, 5004, 5005

	probeTime      = 20 * time.Second
	downloadBefore = 3 * time.Second // a download beside a probe begins that much earlier
	holeTime       = 3 * time.Second // in the middle of a probe
	bulkRate       = 90e6
	bulkTime       = 15 * time.Second
	bulkSettle     = 2 * time.Second
	// As long as a big download: a sender such as quic-go's (CUBIC with HyStart,
	// RFC 9406) takes the first rise of the delay, when the fastest uplink is
	// full, for the end of slow start, and opens its window slowly from there.
	quicTime = 60 * time.Second
)

var interactive = netlab.Probe{Rate: 50, Size: 200, Duration: probeTime}

// benchPackets measures UDP and QUIC over the demo's uplinks.
func benchPackets(ctx context.Context, o benchOptions) error {
	sum := 0.0
	for _, u := range uplinks {
		sum += u.Rate
	}
	fmt.Printf("UDP and QUIC from the LAN, same uplinks. Probe: %.0f/s of %d bytes for %v. Bulk: %.0f Mbit/s of payload offered for %v, the first %v left out. No processor sleeps during an idle probe.\n\n",
		interactive.Rate, interactive.Size, probeTime, bulkRate/1e6, bulkTime, bulkSettle)
	fmt.Printf("%-46s %14s %24s\n", "", "", "target")
	line := func(what, figure, target string) { fmt.Printf("%-46s %14s %24s\n", what, figure, target) }
	milliseconds := func(d time.Duration) string { return fmt.Sprintf("%.1f ms", ms(d)) }
	percent := func(share float64) string { return fmt.Sprintf("%.2f %%", share*100) }

	return withLab(netlab.Config{Uplinks: uplinks, Seed: 1}, func(lab *netlab.Lab) (err error) {
		h := packetHosts{lab: lab}
		defer func() { err = errors.Join(err, h.close()) }()
		if err := h.listen(); err != nil {
			return err
		}
		alone, err := h.probeIdle(ctx)
		if err != nil {
			return err
		}
		best := alone.Percentile(0.5)
		line("best uplink alone, probe, median", milliseconds(best), "")
		line("  p99", milliseconds(alone.Percentile(0.99)), "")
		aloneQUIC, err := h.download(ctx)
		if err != nil {
			return err
		}
		line("best uplink alone, QUIC download", fmt.Sprintf("%.1f Mbit/s", aloneQUIC.Rate()/1e6), "")

		return withBond(lab, o.binaries, func(d *deploy.Deployment) error {
			idle, err := h.probeIdle(ctx)
			if err != nil {
				return err
			}
			line("probe, idle: lost", fmt.Sprintf("%d of %d", idle.Lost, len(idle.Packets)), "0")
			line("  median", milliseconds(idle.Percentile(0.5)), "≤ "+milliseconds(best+2*time.Millisecond))
			line("  p99", milliseconds(idle.Percentile(0.99)), "")

			loaded, rate, err := h.probeBesideDownload(ctx)
			if err != nil {
				return err
			}
			line("probe, beside a TCP download: lost", percent(loaded.Loss), "< 0.1 %")
			line("  median", milliseconds(loaded.Percentile(0.5)), "")
			line("  p99", milliseconds(loaded.Percentile(0.99)), "≤ "+milliseconds(3*best))
			line("  the download, of the payload limit", fmt.Sprintf("%.3f", rate/payloadLimit(uplinks)), "")

			pulled, err := h.probeThroughHole(ctx)
			if err != nil {
				return err
			}
			line(fmt.Sprintf("probe, uplink1 black-holed for %v: longest gap", holeTime), milliseconds(pulled.LongestGap), "≤ 60.0 ms")
			line("  lost", fmt.Sprintf("%d of %d", pulled.Lost, len(pulled.Packets)), "")

			before, err := cpu(d)
			if err != nil {
				return err
			}
			for _, direction := range []string{"upload", "download"} {
				r, err := h.bulk(ctx, direction == "download")
				if err != nil {
					return err
				}
				line("bulk, "+direction+": arrived, of the links' sum", fmt.Sprintf("%.3f", r.Rate/sum), "≥ 0.850")
				line("  reordered", percent(r.ReorderedShare()), "< 1 %")
				line("  lost, twice", fmt.Sprintf("%s, %d", percent(r.Loss), r.Duplicates), "")
			}
			after, err := cpu(d)
			if err != nil {
				return err
			}
			line(fmt.Sprintf("  CPU of both daemons, both ways (%v)", 2*bulkTime), fmt.Sprintf("%.2f s", (after-before).Seconds()), "")

			bonded, err := h.download(ctx)
			if err != nil {
				return err
			}
			line("QUIC download", fmt.Sprintf("%.1f Mbit/s", bonded.Rate()/1e6), "")
			line("  of the best uplink alone", fmt.Sprintf("%.2f", bonded.Rate()/aloneQUIC.Rate()), "≥ 1.60")
			return nil
		})
	})
}

// packetHosts are the LAN client and the servers of the packets part.
type packetHosts struct {
	lab     *netlab.Lab
	closers []func() error // in order of opening
}

func (h *packetHosts) listen() error {
	echo, err := h.lab.Server.ListenPacket("udp", serverAddress(echoPort))
	if err != nil {
		return err
	}
	h.closers = append(h.closers, echo.Close)
	go netlab.ServeEcho(echo)
	socket, err := h.lab.Server.ListenPacket("udp", serverAddress(quicPort))
	if err != nil {
		return err
	}
	server, err := netlab.ServeQUIC(socket)
	if err != nil {
		return err
	}
	h.closers = append(h.closers, server.Close)
	return nil
}

func (h *packetHosts) close() error {
	var errs []error
	for _, c := range h.closers {
		errs = append(errs, c())
	}
	return errors.Join(errs...)
}

func serverAddress(port int) string { return fmt.Sprintf("%s:%d", netlab.ServerAddress, port) }

func (h *packetHosts) probe(ctx context.Context) (r netlab.ProbeResult, err error) {
	c, err := h.lab.LAN.Dial(ctx, "udp", serverAddress(echoPort))
	if err != nil {
		return r, err
	}
	defer func() { _ = c.Close() }()
	return interactive.Run(ctx, c)
}

func (h *packetHosts) probeIdle(ctx context.Context) (r netlab.ProbeResult, err error) {
	err = whileAwake(h.lab, func() error {
		r, err = h.probe(ctx)
		return err
	})
	return r, err
}

// probeBesideDownload also returns the rate of the TCP download, in bit/s.
func (h *packetHosts) probeBesideDownload(ctx context.Context) (r netlab.ProbeResult, rate float64, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var samples []sample
	var failed error
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		samples, failed = transfer(ctx, dialer(h.lab.LAN), false, endless)
	}()
	select {
	case <-time.After(downloadBefore):
	case <-ended: // it has failed
	}
	r, err = h.probe(ctx)
	select {
	case <-ended:
		return r, 0, errors.Join(err, fmt.Errorf("the TCP download beside the probe: %w", failed))
	default:
	}
	cancel()
	<-ended
	if len(samples) == 0 {
		return r, 0, errors.Join(err, fmt.Errorf("the TCP download beside the probe never began: %w", failed))
	}
	_, rate = rates(samples)
	return r, rate, err
}

func (h *packetHosts) probeThroughHole(ctx context.Context) (netlab.ProbeResult, error) {
	var hole errorBox
	best := h.lab.Uplinks[0]
	begin := time.AfterFunc((probeTime-holeTime)/2, func() { hole.set(best.BlackHole(true)) })
	end := time.AfterFunc((probeTime+holeTime)/2, func() { hole.set(best.BlackHole(false)) })
	r, err := h.probe(ctx)
	begin.Stop()
	end.Stop()
	return r, errors.Join(err, hole.get(), best.BlackHole(false))
}

func (h *packetHosts) bulk(ctx context.Context, download bool) (netlab.BulkResult, error) {
	server, err := h.lab.Server.ListenPacket("udp", serverAddress(bulkPort))
	if err != nil {
		return netlab.BulkResult{}, err
	}
	defer func() { _ = server.Close() }()
	client, err := h.lab.LAN.Dial(ctx, "udp", serverAddress(bulkPort))
	if err != nil {
		return netlab.BulkResult{}, err
	}
	defer func() { _ = client.Close() }()
	b := netlab.Bulk{Rate: bulkRate, Size: 1300, Duration: bulkTime, Settle: bulkSettle}
	if download {
		return b.Download(ctx, client, server)
	}
	return b.Upload(ctx, client, server)
}

func (h *packetHosts) download(ctx context.Context) (netlab.QUICResult, error) {
	socket, err := h.lab.LAN.ListenPacket("udp", netlab.LANAddress+":0")
	if err != nil {
		return netlab.QUICResult{}, err
	}
	defer func() { _ = socket.Close() }()
	return netlab.QUICDownload{Duration: quicTime}.Run(ctx, socket, netip.MustParseAddrPort(serverAddress(quicPort)))
}
