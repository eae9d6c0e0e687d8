package main

import (
	"testing"
	"time"
)

const second = time.Second

// part is a rate until a moment.
type part struct {
	until time.Duration
	rate  float64
}

// steady is a sample every 10 ms at a rate in bit/s, in parts that follow each
// other; a rate of 0 is a gap without samples.
func steady(parts ...part) []sample {
	const step = 10 * time.Millisecond
	list := []sample{{}}
	at, bytes := time.Duration(0), 0.0
	for _, p := range parts {
		for ; at < p.until; at += step {
			bytes += p.rate / 8 * step.Seconds()
			if p.rate > 0 {
				list = append(list, sample{at + step, int64(bytes)})
			}
		}
	}
	return list
}

func TestLongestGap(t *testing.T) {
	for _, c := range []struct {
		name    string
		samples []sample
		want    time.Duration
	}{
		{"none", steady(part{4 * second, 80e6}), 10 * time.Millisecond},
		{"at the fault", steady(part{second, 80e6}, part{1200 * time.Millisecond, 0}, part{4 * second, 40e6}), 210 * time.Millisecond},
		{"begun before the fault", steady(part{900 * time.Millisecond, 80e6}, part{1100 * time.Millisecond, 0}, part{4 * second, 40e6}), 210 * time.Millisecond},
		{"over before the fault", steady(part{300 * time.Millisecond, 80e6}, part{900 * time.Millisecond, 0}, part{4 * second, 40e6}), 10 * time.Millisecond},
		{"begun after the window", steady(part{2600 * time.Millisecond, 80e6}, part{3 * second, 0}, part{4 * second, 40e6}), 10 * time.Millisecond},
		{"beyond the window", steady(part{2 * second, 80e6}, part{4 * second, 0}, part{5 * second, 40e6}), 2010 * time.Millisecond},
		{"for ever", steady(part{2 * second, 80e6}), 500 * time.Millisecond},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := longestGap(c.samples, second, second+gapWindow); got != c.want {
				t.Errorf("got %v, want %v", got, c.want)
			}
		})
	}
}

func TestUntilRate(t *testing.T) {
	for _, c := range []struct {
		name    string
		samples []sample
		want    time.Duration
	}{
		{"at once", steady(part{4 * second, 80e6}), 0},
		{"after half a second", steady(part{1500 * time.Millisecond, 40e6}, part{4 * second, 80e6}), 500 * time.Millisecond},
		{"too late", steady(part{3900 * time.Millisecond, 40e6}, part{5 * second, 80e6}), never},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := untilRate(c.samples, second, 4*second, 79.9e6); got != c.want {
				t.Errorf("got %v, want %v", got, c.want)
			}
		})
	}
}

func TestUntilQuiet(t *testing.T) {
	for _, c := range []struct {
		name    string
		samples []sample
		want    time.Duration
	}{
		{"after its queue", steady(part{1120 * time.Millisecond, 40e6}, part{4 * second, 50e3}), 120 * time.Millisecond},
		{"a burst in between", steady(part{1120 * time.Millisecond, 40e6}, part{2 * second, 50e3}, part{2100 * time.Millisecond, 40e6}, part{4 * second, 50e3}), 1100 * time.Millisecond},
		{"never", steady(part{4 * second, 1e6}), never},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := untilQuiet(c.samples[100:], second); got < c.want-10*time.Millisecond || got > c.want+10*time.Millisecond {
				t.Errorf("got %v, want %v", got, c.want)
			}
		})
	}
}
