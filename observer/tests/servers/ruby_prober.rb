# A loop of Ruby's async with the workloads of asyncio_prober.py, which prints the same. Its timers are tasks that all
# go to sleep, each until another time, before the loop waits for the first time.

require "async"
require "json"

SECONDS = 6
TIMERS = 2000
NAP = 0.010
WORKLOAD, LEAD = ARGV[0], ARGV[1].to_f
late, overslept = [], []

def now
  Process.clock_gettime(Process::CLOCK_MONOTONIC)
end

def work(seconds)
  finish = now + seconds
  nil while now < finish
end

# In a non-blocking fiber, this would only yield to the loop.
def block(seconds)
  Fiber.new(blocking: true) { sleep(seconds) }.resume
end

# Work is started in the next iteration, after all timers of this one. After work of the same iteration, the prober
# would also measure the loop's queue.
def load(reactor, task)
  loop do
    reactor.yield
    case WORKLOAD
    when "idle"
      task.sleep(1)
    when "short"
      work(0.002)
      task.sleep(0.006)
    when "rare"
      block(0.2)
      task.sleep(0.8)
    else
      work(0.010)
    end
  end
end

$stdin.gets
# A collection between reading the clock and falling asleep would look like lateness.
GC.disable
reactor = Async::Reactor.new
start, stretch = now + LEAD, SECONDS.to_f / TIMERS
TIMERS.times do |number|
  due = start + (number + rand) * stretch
  reactor.async do |task|
    task.sleep(due - now)
    late << now - due
  end
end
GC.enable
reactor.async do |task|
  task.sleep(start - now)
  reactor.async do |task|
    loop do
      due = now + NAP
      task.sleep(NAP)
      overslept << now - due
    end
  end
  reactor.async { |task| load(reactor, task) }
  task.sleep(start + SECONDS - now)
  reactor.interrupt
end
# Block before the loop waits for the first time: a loop that has not started is not late. Fails if setting timers took
# too long.
sleep(start - now - 0.050)
reactor.run
puts JSON.generate({ timers: late, sleeper: overslept })
# Exits without cleaning up the remaining tasks.
$stdout.flush
exit!(0)
